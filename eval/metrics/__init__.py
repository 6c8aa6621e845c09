"""Metrics: functions of images, captions, codes and features."""
