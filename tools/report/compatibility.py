"""Write docs/compatibility.md: what works on which backend, and its test.

    make docs-compatibility

Runs the tests that the page names, once per backend.
"""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

from tools.report import pages

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch"}

# From a feature to the test of it. All parameters of the test count.
FEATURES = {
    "Training": {
        "`fit` and `train_on_batch`": "test_fit::test_train_on_batch_is_fit",
        "`evaluate`, `predict`, `validation_data`": "test_fit::"
        "test_evaluating_and_predicting_change_nothing",
        "`tf.data`": "test_fit::test_sources_of_data[tf_dataset]",
        "PyTorch `DataLoader`": "test_fit::test_sources_of_data"
        "[torch_dataloader]",
        "`PyDataset`": "test_fit::test_sources_of_data[py_dataset]",
        "`run_eagerly`": "test_fit::test_ways_to_execute[run_eagerly]",
        "`jit_compile=True`": "test_fit::test_ways_to_execute[jit]",
        "`jit_compile=False`": "test_fit::test_ways_to_execute[no_jit]",
        '`jit_compile="auto"`': "test_fit::test_ways_to_execute[auto]",
        "`steps_per_execution`": "test_fit::test_ways_to_execute"
        "[steps_per_execution]",
        "`sample_weight`": "test_fit::test_weights_of_the_samples_enter_s",
        "`class_weight`": "test_fit::test_class_weights_are_sample_weights",
        "several inputs and outputs": "test_fit::"
        "test_several_inputs_and_outputs",
        "`add_loss`, regularizers": "test_fit::"
        "test_an_added_loss_is_a_regularizer",
        "constraints": "test_fit::test_constraints",
        "masks": "test_wrapper_embedding::"
        "test_masked_ids_count_and_the_mask_arrives",
        "`RematScope`": "test_rematerialization::"
        "test_rematerialized_layers_train_like_others",
        "custom training loops": "test_custom_loops::"
        "test_a_custom_loop_gives_the_weights_of_fit",
        "GANs": "test_sharing::"
        "test_both_optimizers_of_a_gan_measure_as_if_they_were_alone",
        "freezing and thawing": "test_fine_tuning::"
        "test_a_backbone_is_frozen_and_thawed",
        "LoRA": "test_fine_tuning::test_lora_may_be_enabled_after_wrapping",
        "threads that predict": "test_fit::test_four_threads_predict",
        "same seed, same weights": "test_optimizer::"
        "test_the_same_seed_gives_the_same_weights",
    },
    "Optimizer": {
        "learning-rate schedules, `learning_rate = ...`": "test_optimizer::"
        "test_learning_rate_schedules_and_assignment",
        "`LearningRateScheduler`, `ReduceLROnPlateau`, `ModelCheckpoint`": ""
        "test_fit::test_callbacks_that_set_the_learning_rate_and_save",
        "`clipnorm`, `clipvalue`, `global_clipnorm`": "test_optimizer::"
        "test_clipping_does_not_see_the_probes",
        "`weight_decay`, `exclude_from_weight_decay`": "test_optimizer::"
        "test_weight_decay_leaves_out_what_is_excluded",
        "`use_ema`, `ema_overwrite_frequency`": "test_optimizer::"
        "test_exponential_moving_averages",
        '`ema_momentum="auto"`': "test_optimizer::"
        "test_averages_over_a_tenth_of_the_steps_so_far",
        "`AdaFisher.anytime`": "test_schedules::"
        "test_training_that_may_end_at_any_time",
        "`evaluate`, `save` and `fit` after `use_ema`": "test_optimizer::"
        "test_a_model_with_averaged_weights_is_used_and_trained_on",
        "`SwapEMAWeights`": "test_callbacks::"
        "test_averages_of_weights_are_evaluated_and_stay",
        "`loss_scale_factor`": "test_optimizer::"
        "test_a_fixed_loss_scale_changes_nothing",
        "`LossScaleOptimizer`": "test_optimizer::"
        "test_a_step_that_the_loss_scale_optimizer_skips_changes_nothing",
        "mixed_float16": "test_optimizer::test_mixed_precision[mixed_float16]",
        "mixed_bfloat16": "test_optimizer::"
        "test_mixed_precision[mixed_bfloat16]",
        "float8": "test_like_a_builtin::test_float8",
        "float64": "test_fit::test_float64",
        "`gradient_accumulation_steps`": "test_optimizer::"
        "test_accumulated_gradients_are_those_of_the_larger_batch",
        "`MultiOptimizer`": "test_fit::test_one_of_several_optimizers",
        "variables of no layer, with a warning": "test_like_a_builtin::"
        "test_variables_of_no_layer_are_trained",
        "missing gradients": "test_like_a_builtin::"
        "test_gradients_that_are_missing",
        "sparse gradients": "test_like_a_builtin::"
        "test_sparse_gradients_are_dense_ones_with_zeros",
        "variables of TensorFlow": "test_like_a_builtin::"
        "test_tf_variables_are_trained_next_to_those_of_keras",
        "variables that their gradient overwrites": "test_like_a_builtin::"
        "test_a_variable_that_is_overwritten_by_its_gradient",
        "numbered names": "test_like_a_builtin::test_names_are_numbered",
        "two on shared layers": "test_sharing::"
        "test_each_of_two_optimizers_measures_as_if_it_were_alone",
        "compiling with another one and back": "test_hooks::"
        "test_compiling_with_another_optimizer_unwraps_and_back",
    },
    "Saving": {
        "`get_config`, `from_config`": "test_optimizer::test_config_round_trip",
        "`save`, `load_model`, resuming": "test_saving::"
        "test_resuming_is_as_if_there_had_been_no_interruption",
        "files to and from plain Keras": "test_saving::"
        "test_files_pass_to_and_from_a_process_without_the_package",
        "`EarlyStopping(restore_best_weights=True)`": "test_saving::"
        "test_early_stopping_restores_the_best_weights",
        "`BackupAndRestore`": "test_fit::test_backup_and_restore",
        "`copy.deepcopy`, `pickle`": "test_saving::"
        "test_a_copy_goes_on_alone_as_the_original_would",
        "`clone_model`": "test_saving::test_a_clone_is_wrapped_for_itself",
        "weights to and from plain models": "test_plain_views::"
        "test_weights_go_both_ways_between_wrapped_and_plain_models",
        "`get_state_tree`, `set_state_tree`": "test_like_a_builtin::"
        "test_state_trees_pass_between_wrapped_and_plain_models",
        "`tf.train.Checkpoint`": "test_like_a_builtin::"
        "test_tf_train_checkpoint_rolls_training_back",
        "`to_json`, `compile_from_config`": "test_like_a_builtin::"
        "test_models_are_made_again_from_their_compile_config",
        "`summary`": "test_plain_views::test_summary_counts_the_weights",
        "export to SavedModel": "test_plain_views::"
        "test_an_exported_model_has_no_trace_of_probes",
        "export to ONNX": "test_plain_views::"
        "test_an_exported_onnx_model_has_no_trace_of_probes",
        "export to `torch.export`": "test_plain_views::"
        "test_an_exported_program_of_pytorch_has_no_trace_of_probes",
        "export to LiteRT": "test_plain_views::"
        "test_an_exported_lite_model_gives_the_same_outputs",
    },
}


def run_tests(backend):
    """Run the tests of all features.

    Args:
        backend: String.

    Returns:
        Dict from `file::test[parameters]` to "yes", "no" or why it was
        skipped.
    """
    ids = sorted(
        {
            test.split("[")[0].replace("::", ".py::")
            for features in FEATURES.values()
            for test in features.values()
        }
    )
    # Files that have nothing to say for a backend aren't collected.
    if backend == "tensorflow":
        ids = [i for i in ids if not i.startswith("test_rematerialization")]
    with tempfile.TemporaryDirectory() as directory:
        report = f"{directory}/report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
            + [f"tests/{i}" for i in ids],
            cwd=pages.ROOT,
            env={**os.environ, "KERAS_BACKEND": backend},
        )
        cases = xml.etree.ElementTree.parse(report).iter("testcase")
        results = {}
        for case in cases:
            name = f"{case.get('classname').split('.')[-1]}::{case.get('name')}"
            skipped = case.find("skipped")
            if skipped is not None:
                results[name] = skipped.get("message")
            elif len(case) and case.find("failure") is not None:
                results[name] = "no"
            else:
                results[name] = "yes"
    return results


def outcome(results, test):
    """One word for all cases of a test, or why they were skipped."""
    found = {
        result
        for name, result in results.items()
        if name == test or name.startswith(test + "[")
    }
    if not found:
        return "fails in plain Keras"
    return "no" if "no" in found else found.pop() if len(found) == 1 else "yes"


def main():
    """Write the page."""
    results = {backend: run_tests(backend) for backend in BACKENDS}
    sections = []
    for title, features in FEATURES.items():
        rows = []
        for feature, test in features.items():
            cells = [outcome(results[backend], test) for backend in BACKENDS]
            file, name = test.split("::")
            rows.append([feature, *cells, f"`{file}.py`: `{name}`"])
        table = pages.table(["feature", *BACKENDS.values(), "test"], rows)
        sections.append(f"## {title}\n\n{table}")
    page = pages.fill(
        __file__, "compatibility.md", features="\n\n".join(sections)
    )
    pages.write(pages.DOCS / "compatibility.md", page)


if __name__ == "__main__":
    main()
