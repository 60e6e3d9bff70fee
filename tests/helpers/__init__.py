"""What tests of several folders share; pytest and the scripts put ``tests`` on the path."""
