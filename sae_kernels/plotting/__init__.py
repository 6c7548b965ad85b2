"""Pictures and pages: one style, one way to render, shared by report, analyze and bench."""
