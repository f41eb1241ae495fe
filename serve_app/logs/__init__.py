"""What this process writes about itself: JSON lines in which no patient, image or secret can be found."""
