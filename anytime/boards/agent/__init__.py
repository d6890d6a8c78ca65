"""What is copied to a board with a job: plain Python 3.6 with numpy, no import of ours but each other and stops.py. See agent.py."""
