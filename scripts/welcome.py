"""What `make run` says before the gateway starts."""

print(
    """
gateway: listening on smtp://127.0.0.1:2587 (STARTTLS) and smtps://127.0.0.1:2465
gateway: user demo@example.org, password demo; mail arrives as a Maildir below var/mail
gateway: try, in another terminal:

  swaks --server 127.0.0.1:2587 --tls --auth PLAIN --auth-user demo@example.org --auth-password demo \\
        --from a@example.org --to b@example.org
  ls var/mail/new

or, without swaks:

  curl --insecure --ssl-reqd --user demo@example.org:demo --mail-from a@example.org --mail-rcpt b@example.org \\
       --upload-file README.md smtp://127.0.0.1:2587

gateway: Ctrl-C stops it
""",
    flush=True,
)
