"""The edge: each module talks to exactly one foreign thing, and none knows another."""
