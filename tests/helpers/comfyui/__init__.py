"""ComfyUI, and servers for its nodes, in tests."""
