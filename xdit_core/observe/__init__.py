"""What watches a run without changing it: traces, timelines, fingerprints for ``verify``, the comparison of
collectives."""
