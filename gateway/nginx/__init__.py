"""nginx's mail configuration as pipeline files: `gateway import-nginx`.

`conf` reads the file, `directives` knows what nginx accepts, `merge` makes each `server {}` whole, `document` and what
it uses say the same in the gateway's words, `write` prints it as YAML with comments.
"""
