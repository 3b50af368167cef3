"""Print a reply as it streams in, from a Textbot or a Batchbot.

python clients/stream_client.py "Tell me a joke." --max-new-tokens 30
"""

import argparse
import os
import sys

import requests


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a reply as it streams in.")
    parser.add_argument("prompt", nargs="?", default="Tell me a story about dogs.")
    parser.add_argument("--url", default="http://localhost:8000/")
    parser.add_argument(
        "--max-new-tokens", type=int, help="the most tokens that the reply may have"
    )
    parser.add_argument(
        "--api-key-file", type=argparse.FileType(), help="a file with the key that the bot asks for"
    )
    options = parser.parse_args()

    headers = {}
    if options.api_key_file:
        headers["Authorization"] = f"Bearer {options.api_key_file.read().strip()}"
    body = {"prompt": options.prompt}
    if options.max_new_tokens is not None:
        body["max_new_tokens"] = options.max_new_tokens
    try:
        with requests.post(options.url, json=body, headers=headers, stream=True) as response:
            if not response.ok:
                sys.exit(f"{options.url} answered {response.status_code}: {response.text}")
            for chunk in response.iter_content(chunk_size=None, decode_unicode=True):
                print(chunk, end="", flush=True)
            print()
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except requests.exceptions.ChunkedEncodingError:
        print()
        sys.exit(f"{options.url} failed in the middle of the reply")
    except requests.ConnectionError:
        sys.exit(f"nothing answers at {options.url}: is a bot running? (serve run textbot:app)")
    except requests.RequestException as error:
        sys.exit(f"cannot ask {options.url}: {error}")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main()
