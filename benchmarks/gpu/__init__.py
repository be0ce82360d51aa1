"""One command for a GPU: builds, checks and measures, each step bounded in time; see ``__main__.py``."""
