"""Results as files: names, pictures, videos, contact sheets, and the settings inside them."""
