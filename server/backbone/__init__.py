"""The frozen model: loading, its sites, and how adapters and paged attention attach to it."""
