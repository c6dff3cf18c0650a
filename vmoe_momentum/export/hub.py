"""Uploading a directory to the Hugging Face hub."""

from pathlib import Path


def push(folder: Path, name: str) -> str:
    """The address of the uploaded model. name: OWNER/NAME; the token is the one of `hf auth login`.

    Raises ValueError: no token, no right to write there, no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        repository = api.create_repo(name, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository.repo_id, commit_message="Export of vmoe_momentum")
    except (OSError, ValueError, HfHubHTTPError, LocalTokenNotFoundError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--push={name}: not uploaded ({first}); {folder} is complete, log in and push again"
        ) from error
    return str(repository)
