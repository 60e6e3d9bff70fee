"""For the tests of plugins: a pool of gloo workers, tiny pipelines, plans without a machine.

The pytest plugin in ``plugin.py`` offers these as fixtures wherever xdit is installed.
"""
