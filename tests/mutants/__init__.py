"""The suite tested: one-line faults in copies of the sources, each of which some test must notice.

    python -m tests.mutants [WORD...]    those whose names hold every word; make mutants runs all of them
    python -m tests.mutants --list       their names, places and lines

Faults are made by rule (rules.py), a sample of every file that suites.py names, drawn by a seed, and written by hand
(written.py). Python and Triton run in a copy of the package beside the unbroken library of C++, so that a fault of one
language shows as disagreement with the other; C++ and CUDA are compiled anew (trees.py). What a fault fails is run
without it as well, and must pass. Faults that nothing can notice are in survivors.txt, with the reason.

Verdicts are kept in build/mutants, each by the contents of the file and of its tests: the same command takes up a run
that was interrupted, and judges again what has changed.
"""
