"""The bucket tier: checkpoints in an object store; ``docs/format.md`` has the layout."""
