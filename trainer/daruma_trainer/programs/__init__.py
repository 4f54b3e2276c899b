"""Programs that users run as they are, or copy."""
