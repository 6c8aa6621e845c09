"""Metrics: functions of images, captions and features."""
