"""A discrete-event fleet, driven by the same step and pick as production; pure."""
