"""Guest images built from the distribution's own packages. Run through scripts/build-image; standard library only."""
