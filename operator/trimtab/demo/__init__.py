"""Two fleets, one Envoy, the same arrivals: what balancing by backlog changes, on one machine."""
