"""What is stored, byte for byte: values that read and write themselves, without I/O."""
