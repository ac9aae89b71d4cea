"""Threads that do things at once."""

import threading
import time

SECONDS = 0.5  # that they get at each other


def at_once(*actions):
    """Call each in a thread of its own, all at once. Raise their first error."""
    begin, errors = threading.Barrier(len(actions)), []

    def run(action):
        begin.wait()
        try:
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def repeated(action):
    """Return a function that repeats an action until time is up and it has succeeded
    three times. An action that was refused returns False."""

    def run():
        begin, done = time.monotonic(), 0
        while time.monotonic() < begin + SECONDS or done < 3:
            if action() is False:
                time.sleep(1e-5)  # so that the holder goes on
            else:
                done += 1
            assert time.monotonic() < begin + 60, "always refused"

    return run
