"""Images and where they come from: the whole set on the device, cropped and flipped there, in a resumable order."""
