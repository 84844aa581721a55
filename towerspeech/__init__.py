"""What two or more TowerSpeech scripts share; every script stays runnable by itself."""

__version__ = "0.1.0"
