"""From names and settings to a plan: settings, degrees, checks, and the plan of a request. Without torch."""
