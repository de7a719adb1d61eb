"""Data for training, calibration and evaluation: chats with images, read and checked."""
