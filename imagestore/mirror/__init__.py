"""Running a mirror: bringing images in, signing their names, serving them to people and tools that know no sf."""
