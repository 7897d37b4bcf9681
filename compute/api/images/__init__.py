"""What the API has of images: artifacts, snapshots and backups of instances, namespaces' own stores."""
