"""Ranks and what lies on them: the mesh, the layout of the tokens, messages between ranks, tensors whose rows come
later."""
