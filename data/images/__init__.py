"""What happens to pixels: decoding, resizing, augmentation, batches on the device."""
