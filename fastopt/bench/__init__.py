"""``fastopt bench`` compares the time of a step with other libraries.

``cases.py`` lists what is measured. ``contender.py`` runs the steps of one contender in
a process of its own, and ``peers.py`` has what other libraries call our rules.
``measure.py`` turns rounds into ratios, ``machine.py`` describes the computer,
``report.py`` and ``pictures.py`` show the results, and ``run.py`` is the command.
"""
