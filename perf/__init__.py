"""The benchmark of gemsmode: ``python -m perf``, run from the root of the repository.

``cases.py`` declares what is measured, ``measure.py`` how, ``runner.py`` runs cases and keeps rows, ``results.py``
shows and compares rows, ``host.py`` takes the host time of a call apart.
"""
