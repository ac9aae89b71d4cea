"""``fastopt bench``: what a step costs beside the libraries that people use.

``cases.py`` says what is measured, ``contender.py`` who takes part (each in a process
of its own), ``measure.py`` how rounds become ratios, ``machine.py`` where it happened;
``report.py`` and ``pictures.py`` show the results, and ``run.py`` is the command.
"""
