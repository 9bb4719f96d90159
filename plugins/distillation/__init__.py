"""What students learn from: soft targets, matched features, more text, and how a student is cut."""
