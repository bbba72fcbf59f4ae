"""`python -m onecard`."""

try:
    from onecard.cli import main
except KeyboardInterrupt:  # from here on cli.py looks after it
    raise SystemExit(130) from None

main()
