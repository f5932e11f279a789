"""A package, so that another `tests` in an environment (torch-fidelity installs one) is not taken for it."""
