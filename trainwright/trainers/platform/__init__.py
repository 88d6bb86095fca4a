"""What differs between devices: an object each (`base`), and which of them a run is on (`choose`); no torch."""
