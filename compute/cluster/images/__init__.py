"""What disks are made of, as the server knows it: artifacts, what brings them, namespaces' own stores, snapshots."""
