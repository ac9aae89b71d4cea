"""Where parameters and state live."""
