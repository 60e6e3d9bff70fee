"""The five extension points that strategies wrap: request, forward, trunk, attention, decode."""
