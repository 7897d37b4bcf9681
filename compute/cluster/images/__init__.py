"""What disks are made of, as the server knows it: names of stores as artifacts, later blobs and backups."""
