"""What a step needs of its process: threads, forks, interrupts, arithmetic modes."""
