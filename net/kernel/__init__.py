"""What touches the kernel: netlink, nftables, and what is observed."""
