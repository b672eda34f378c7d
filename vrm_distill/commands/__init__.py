"""The sub-commands of ``vrm-distill``, a module each: ``main(argv)`` gives the exit status."""
