"""A real Kubernetes for tests, without containers and without a registry.

Level A (`control_plane`) is a control plane: etcd, kube-apiserver, kube-controller-manager,
kube-scheduler. Level B (`fake_nodes`) adds nodes on which a Deployment becomes pods that answer.
docs/testing.md says what is real at which level.
"""
