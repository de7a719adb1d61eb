"""Qualcomm's compiler and emulator."""
