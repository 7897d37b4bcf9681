"""libvirt and qemu: the domain, its XML, and whether KVM works here."""
