"""The plugins that are installed: found by entry point, loaded one by one, and looked at before they are believed.
Without torch."""
