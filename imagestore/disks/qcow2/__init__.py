"""qcow2, read and written without qemu."""
