"""What a store is made of: names, leases, packs, and who may read or write which."""
