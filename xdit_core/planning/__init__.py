"""Make a plan from names and settings: degrees, checks, and the plan of a request. Without torch."""
